"""The code of a converted model. A saved model has a copy of these files, and loads without the package."""
