"""Studies of the project itself: run in a checkout by `make study`."""
