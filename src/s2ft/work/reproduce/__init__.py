"""The S²FT paper's experiments as recipes: from data to a score beside the paper's."""
