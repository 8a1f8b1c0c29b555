"""Other methods, each from its paper, and the comparison with them. Nothing from calibration to generation imports this."""
