"""Small studies of the paper's claims on the embedded base model: selection, generalisation, fusion (docs/studies.md)."""
