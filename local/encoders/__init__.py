"""Find, load and describe the encoder of `--encoder SPEC`."""
