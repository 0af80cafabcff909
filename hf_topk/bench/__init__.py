"""Speed, beside the dense head and the methods of others."""
