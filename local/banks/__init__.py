"""How embeddings become ranked classes: banks, the metadata prior, and their choice by cross-validation."""
