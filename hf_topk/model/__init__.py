"""What a converted model is made of: a saved model carries a copy of all of this, and loads without the package."""
