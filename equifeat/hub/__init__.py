"""Models of a Hugging Face hub: their names, their files, and what can go wrong."""
