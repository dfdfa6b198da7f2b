"""What users build on the features: short functions that the recipes of docs/downstream use."""
