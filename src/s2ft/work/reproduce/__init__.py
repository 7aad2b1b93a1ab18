"""The S²FT paper's experiments: every row of its tables as a recipe, run from data to a score beside the paper's."""
