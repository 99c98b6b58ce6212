"""All that runs on your machine: train, rehearse, generate, demonstrate. Imports `kernel/`, which never imports it."""
