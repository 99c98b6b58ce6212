"""What a run may choose of the kernel, by name; without torch, so that a recipe is checked before it is imported."""

POOLINGS = ("mean", "max")  # over an observation's photos
# The keys of kernel.views.VIEWS, in order of worth: a budget keeps the first of a recipe's views.
VIEW_NAMES = (
    "plain", "hflip", "rotate90", "rotate270", "rotate15", "rotate345", "centre", "top-left", "top-right",
    "bottom-left", "bottom-right", "larger",
)  # fmt: skip
