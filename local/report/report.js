"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 100; // rows shown at once; laying out thousands takes long
const sheet = document.getElementById("sheet");

/** An element with properties and children; text is never read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const classes = new Map(data.order.map((label) => {
  const row = Object.fromEntries(data.columns.map((column, index) => [column, data.classes[label][index]]));
  const text = [row.id, row.name, ...row.lineage, row.poisonous ? "poisonous" : ""].join(" ").toLowerCase();
  return [label, { ...row, label, text }];
}));
const mistaken = data.mistaken.map(([truth, guessed, observations]) => {
  const [one, other] = [classes.get(truth), classes.get(guessed)];
  return { truth: one.name, guessed: other.name, observations, labels: [truth, guessed], text: `${one.text} ${other.text}` };
});

/** A button that opens a class. */
function opener(label) {
  const { name, poisonous } = classes.get(label);
  const button = make("button", { className: "open" }, name);
  button.dataset.class = label;
  return poisonous ? make("span", {}, button, make("span", { className: "poison", title: "poisonous" }, " ☠")) : button;
}

function picture(label) {
  const photo = data.photo_of[label];
  if (photo === undefined) return make("span", { className: "photo none" }, "no photo");
  return make("img", { className: "photo", src: data.photos[photo], alt: "", width: 96, height: 96 });
}

const digits = (count) => (value) => (value === null ? "–" : value.toFixed(count));
/** The columns of each table, as [heading, key to sort by, cell of a row, CSS class], and the first sorting. */
const TABLES = {
  classes: {
    rows: [...classes.values()],
    columns: [
      ["species", "name", (row) => opener(row.label), ""],
      ["id", "id", (row) => row.id, "aside"],
      ...data.ranks.map((rank, level) => [rank, (row) => row.lineage[level] ?? "", (row) => row.lineage[level] ?? "–", "aside"]).slice(-2),
      ["shots", "shots", (row) => row.shots, "n"],
      ["held out", "queries", (row) => row.queries, "n"],
      ["guessed", "guessed", (row) => row.guessed, "n aside"],
      ["R@1", "recall_at_1", (row) => digits(2)(row.recall_at_1), "n"],
      ["R@5", "recall_at_5", (row) => digits(2)(row.recall_at_5), "n"],
      ["F1", "f1", (row) => digits(2)(row.f1), "n aside"],
      ["mean probability", "probability", (row) => digits(3)(row.probability), "n aside"],
    ],
    first: ["held out", -1],
  },
  mistaken: {
    rows: mistaken,
    columns: [
      ["true", "truth", (row) => opener(row.labels[0]), ""],
      ["guessed", "guessed", (row) => opener(row.labels[1]), ""],
      ["times", "observations", (row) => row.observations, "n"],
    ],
    first: ["times", -1],
  },
};

/** A table with a search field and sortable columns, which shows its rows page by page. */
function fillTable(element, { rows, columns, first }) {
  let [heading, direction] = first;
  let shown = PAGE;
  const input = make("input", { type: "search", placeholder: "Search", ariaLabel: "Search" });
  const count = make("span", { className: "muted", role: "status" });
  const body = make("tbody");
  const more = make("button", { className: "more" });
  const heads = columns.map(([name, , , kind]) => {
    const button = make("button", {}, name);
    button.addEventListener("click", () => {
      direction = heading === name ? -direction : kind.startsWith("n") ? -1 : 1;
      heading = name;
      shown = PAGE;
      update();
    });
    return make("th", { className: kind, scope: "col" }, button);
  });

  function update() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => words.every((word) => row.text.includes(word)));
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
    more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
  }

  input.addEventListener("input", () => { shown = PAGE; update(); });
  more.addEventListener("click", () => { shown += PAGE; update(); });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  element.append(make("div", { className: "search" }, input, count), make("div", { className: "scroll" }, table), more);
  update();
}

/** A list of classes with photos and counts. */
function listed(title, pairs) {
  if (!pairs.length) return null;
  const lines = pairs.map(([label, times]) =>
    make("div", { className: "pair" }, picture(label), make("span", {}, opener(label), ` ${times}×`)));
  return make("section", {}, make("h3", {}, title), make("div", { className: "grid" }, ...lines));
}

function openClass(label) {
  const row = classes.get(label);
  const facts = [
    ["id", row.id],
    ...data.ranks.map((rank, level) => [rank, row.lineage[level] ?? "–"]),
    ["observations in the bank", row.shots],
    ["held out", row.queries],
    ["guessed", row.guessed],
    ["Recall@1, Recall@5", `${digits(2)(row.recall_at_1)}, ${digits(2)(row.recall_at_5)}`],
    ["F1", digits(2)(row.f1)],
    ["mean probability of the true class", digits(3)(row.probability)],
  ];
  if (row.poisonous) facts.push(["poisonous", "yes"]);
  const mine = (own, other) => data.mistaken.filter((one) => one[own] === label).map((one) => [one[other], one[2]]);
  show(
    make("h2", { id: "sheet-title" }, row.name),
    make("div", { className: "strip" }, picture(label)),
    make("dl", { className: "facts" }, ...facts.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))])),
    listed("It is taken for", mine(0, 1)),
    listed("Taken for it", mine(1, 0)),
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
