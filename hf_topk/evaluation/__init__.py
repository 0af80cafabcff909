"""How near a converted model is to the dense one."""
