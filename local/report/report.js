"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const sheet = document.getElementById("sheet");

/** An element with properties and children; text is never read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const classes = new Map(data.order.map((label) => {
  const row = { label };
  data.columns.forEach((column, index) => { row[column] = data.classes[label][index]; }); // tens of thousands of rows
  row.text = `${row.id} ${row.name} ${row.lineage.join(" ")}${row.poisonous ? " poisonous" : ""}`.toLowerCase();
  return [label, row];
}));
const errors = data.errors.map((cells) => {
  const row = Object.fromEntries(data.error_columns.map((column, index) => [column, cells[index]]));
  const [one, other] = [classes.get(row.true), classes.get(row.guessed)];
  const pair = `${one.name} → ${other.name}`;
  return { ...row, one, other, pair, trueName: one.name, guessedName: other.name, text: `${row.observation} ${one.text} ${other.text}` };
});

/** The marks of observations, kept by the browser where it lets a page keep anything. */
const MARKS = ["mislabelled", "duplicate"];
const store = `marks ${data.id}`;
let marks = {};
try { marks = JSON.parse(localStorage.getItem(store)) ?? {}; } catch { /* nothing is kept */ }
const saver = make("button", { className: "more" });
function mark(observation, value) {
  if (value) marks[observation] = value; else delete marks[observation];
  try { localStorage.setItem(store, JSON.stringify(marks)); } catch { /* nothing is kept */ }
  countMarks();
}
function countMarks() {
  const count = Object.keys(marks).length;
  saver.textContent = `Save ${count} mark${count === 1 ? "" : "s"} as marks.csv`;
  saver.disabled = count === 0;
}
saver.addEventListener("click", () => {
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = Object.entries(marks).map(([observation, value]) => `${quoted(observation)},${value}\n`);
  const href = URL.createObjectURL(new Blob(["observation,mark\n", ...lines], { type: "text/csv" }));
  make("a", { href, download: "marks.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
});
countMarks();

function marker(observation) {
  const select = make("select", { ariaLabel: `Mark observation ${observation}` }, ...["", ...MARKS].map((value) => make("option", { value }, value || "–")));
  select.value = marks[observation] ?? "";
  select.addEventListener("change", () => mark(observation, select.value));
  return select;
}

/** A name that may break after an underscore or a slash. */
function breakable(name) {
  return name.split(/(?<=[_/])/).flatMap((part) => [part, make("wbr")]);
}

/** A button that opens a class. */
function opener(label) {
  const { name, poisonous } = classes.get(label);
  const button = make("button", { className: "open" }, ...breakable(name));
  button.dataset.class = label;
  return poisonous ? make("span", {}, button, make("span", { className: "poison", title: "poisonous" }, " ☠")) : button;
}

function picture(photo) {
  if (photo === undefined || photo === null) return make("span", { className: "photo none" }, "no photo");
  return make("img", { className: "photo", src: data.photos[photo], alt: "", width: 96, height: 96 });
}

function pair(photo, label, ...more) {
  return make("div", { className: "pair" }, picture(photo), make("span", {}, opener(label), ...more));
}

const percent = (value) => (value < 0.01 ? "< 1 %" : value > 0.99 ? "> 99 %" : `${Math.round(100 * value)} %`).replace(" ", "\u00a0");
/** Filters of a table: a label, and the choices as [text, which rows]. */
const counted = (values) => [...values.reduce((counts, value) => counts.set(value, (counts.get(value) ?? 0) + 1), new Map())];
const poisonous = (one, other) => (row) => row.one.poisonous === one && row.other.poisonous === other;
const ERROR_FILTERS = [
  ["confusion", counted(errors.map((row) => row.pair)).sort((one, other) => other[1] - one[1]).slice(0, 200)
    .map(([name, count]) => [`${name} (${count})`, (row) => row.pair === name])],
  ["rank of the true class", [["2 to 5", 2, 5], ["6 to 10", 6, 10], ["more than 10", 11, Infinity]]
    .map(([text, low, high]) => [text, (row) => row.position >= low && row.position <= high])],
  ["shots", [0, 1, 2, 3, 4].map((count) => [count < 4 ? `${count}` : "4 or more", (row) => (count < 4 ? row.shots === count : row.shots >= 4)])],
  ["confidence", [["at least 95 %", 0.95, 2], ["80 to 95 %", 0.8, 0.95], ["50 to 80 %", 0.5, 0.8], ["less than 50 %", 0, 0.5]]
    .map(([text, low, high]) => [text, (row) => row.probability >= low && row.probability < high])],
  ["poison", [["poisonous taken for edible", poisonous(true, false)], ["edible taken for poisonous", poisonous(false, true)]]],
  ["mark", [["none", (row) => !marks[row.observation]], ...MARKS.map((value) => [value, (row) => marks[row.observation] === value])]],
].map(([label, choices]) => [label, choices.filter(([, keeps]) => label === "mark" || errors.some(keeps))])
  .filter(([, choices]) => choices.length > 0);

const digits = (count) => (value) => (value === null ? "–" : value.toFixed(count));
/** The columns of each table, as [heading, key to sort by, cell of a row, CSS class], and the first sorting. */
const TABLES = {
  classes: {
    rows: [...classes.values()],
    page: 50,
    columns: [
      ["species", "name", (row) => opener(row.label), ""],
      ["id", "id", (row) => row.id, "aside"],
      ...data.ranks.map((rank, level) => [rank, (row) => row.lineage[level] ?? "", (row) => row.lineage[level] ?? "–", "aside"]).slice(-2),
      ["shots", "shots", (row) => row.shots, "n"],
      ["n", "queries", (row) => row.queries, "n"],
      ["predicted", "guessed", (row) => row.guessed, "n aside"],
      ["R@1", "recall_at_1", (row) => digits(2)(row.recall_at_1), "n"],
      ["R@5", "recall_at_5", (row) => digits(2)(row.recall_at_5), "n"],
      ["F1", "f1", (row) => digits(2)(row.f1), "n aside"],
      ["mean probability", "probability", (row) => digits(3)(row.probability), "n aside"],
    ],
    first: ["n", -1],
  },
  errors: {
    rows: errors,
    page: 25,
    filters: ERROR_FILTERS,
    extra: saver,
    columns: [
      ["true class", "trueName", (row) => pair(row.photo, row.true, make("br"), make("small", {}, row.observation)), ""],
      ["predicted class", "guessedName", (row) => pair(row.nearest, row.guessed), ""],
      ["same error", "count", (row) => `${row.count} ×`, "n aside"],
      ["rank", "position", (row) => row.position, "n aside"],
      ["shots", "shots", (row) => row.shots, "n aside"],
      ["confidence", "probability", (row) => percent(row.probability), "n"],
      ["common rank", "shared_rank", (row) => row.shared_rank ?? "–", "aside"],
      ["mark", (row) => marks[row.observation] ?? null, (row) => marker(row.observation), ""],
    ],
    first: ["same error", -1],
  },
};

/** A table with a search field, filters and sortable columns, which shows its rows page by page: thousands take long. */
function fillTable(element, { rows, page, columns, first, filters = [], extra = null }) {
  let [heading, direction] = first;
  let shown = page;
  const input = make("input", { type: "search", placeholder: "Search", ariaLabel: "Search" });
  const count = make("span", { className: "muted", role: "status" });
  const body = make("tbody");
  const more = make("button", { className: "more" });
  const heads = columns.map(([name, , , kind]) => {
    const button = make("button", {}, name);
    button.addEventListener("click", () => {
      direction = heading === name ? -direction : kind.startsWith("n") ? -1 : 1;
      heading = name;
      shown = page;
      update();
    });
    return make("th", { className: kind, scope: "col" }, button);
  });

  function update() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = selects.map((select, index) => filters[index][1][select.value]?.[1]).filter(Boolean);
    const found = rows.filter((row) => words.every((word) => row.text.includes(word)) && chosen.every((keeps) => keeps(row)));
    const key = columns.find(([name]) => name === heading)[1];
    const value = typeof key === "function" ? key : (row) => row[key];
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    const keyed = found.map((row) => [value(row), row]);
    // Rows without a value come last in both directions.
    keyed.sort(([one], [other]) => (one === null) - (other === null)
      || direction * (typeof one === "string" ? compare(one, other) : one - other));
    body.replaceChildren(...keyed.slice(0, shown).map(([, row]) =>
      make("tr", {}, ...columns.map(([, , cell, kind]) => make("td", { className: kind }, cell(row))))));
    heads.forEach((head, index) => {
      const isSorted = columns[index][0] === heading;
      head.setAttribute("aria-sort", isSorted ? (direction > 0 ? "ascending" : "descending") : "none");
    });
    count.textContent = `${found.length} of ${rows.length}`;
    more.hidden = found.length <= shown;
    more.textContent = `Show ${Math.min(page, found.length - shown)} more`;
  }

  const selects = filters.map(([, choices]) => make("select", {}, make("option", { value: "" }, "all"),
    ...choices.map(([text], index) => make("option", { value: index }, text))));
  const labels = filters.map(([label], index) => make("label", {}, label, selects[index]));
  selects.forEach((select) => select.addEventListener("change", () => { shown = page; update(); }));
  input.addEventListener("input", () => { shown = page; update(); });
  more.addEventListener("click", () => { shown += page; update(); });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  element.append(make("div", { className: "search" }, input, ...labels, count), make("div", { className: "scroll" }, table), more, ...(extra ? [extra] : []));
  update();
}

/** A list of classes with photos and counts. */
function listed(title, pairs) {
  if (!pairs.length) return null;
  const lines = pairs.map(([label, times]) => pair(data.photo_of[label], label, ` ${times} ×`));
  return make("section", {}, make("h3", {}, title), make("div", { className: "grid" }, ...lines));
}

function openClass(label) {
  const row = classes.get(label);
  const facts = [
    ["id", row.id],
    ...data.ranks.map((rank, level) => [rank, row.lineage[level] ?? "–"]),
    ["observations in the bank", row.shots],
    ["held-out observations", row.queries],
    ["predicted for", row.guessed],
    ["Recall@1, Recall@5", `${digits(2)(row.recall_at_1)}, ${digits(2)(row.recall_at_5)}`],
    ["F1", digits(2)(row.f1)],
    ["mean probability of the true class", digits(3)(row.probability)],
  ];
  if (row.poisonous) facts.push(["poisonous", "yes"]);
  const mine = (own, other) => counted(errors.filter((one) => one[own] === label).map((one) => one[other]))
    .sort((one, another) => another[1] - one[1]);
  show(
    make("h2", { id: "sheet-title" }, row.name),
    make("div", { className: "strip" }, picture(data.photo_of[label])),
    make("dl", { className: "facts" }, ...facts.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))])),
    listed("Mistaken for", mine("true", "guessed")),
    listed("Mistaken for it", mine("guessed", "true")),
  );
}

function show(...content) {
  sheet.classList.remove("enlarged");
  sheet.querySelector(".sheet").replaceChildren(...content.filter((child) => child !== null));
  if (!sheet.open) sheet.showModal();
  sheet.scrollTop = 0;
}

document.querySelectorAll("[data-photo]").forEach((image) => { image.src = data.photos[image.dataset.photo]; });
document.querySelectorAll("[data-table]").forEach((element) => fillTable(element, TABLES[element.dataset.table]));
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-class]");
  if (button) openClass(Number(button.dataset.class));
  const plot = event.target.closest(".zoom");
  if (plot) {
    show(make("h2", { id: "sheet-title" }, plot.closest("figure").querySelector("figcaption").textContent), plot.nextElementSibling.content.cloneNode(true));
    sheet.classList.add("enlarged");
  }
  if (event.target === sheet) sheet.close();
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, textarea");
  if (event.key === "/" && !isTyping && !sheet.open) {
    event.preventDefault();
    document.querySelector("#classes input").focus();
  }
});
