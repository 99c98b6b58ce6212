"""All that runs on Kaggle: from the mounted inputs to a checked submission.csv, in the order the data flows.

`python -m kernel` runs it as a package; `bundle.py` flattens it into one script. It never imports `local/`, while
`local/` imports it, so that training, validation and submission share one path from photo to class.
"""
