"""The Power of Ten (Holzmann 2006), as far as it carries over to Python; read by `forge pot10`."""
