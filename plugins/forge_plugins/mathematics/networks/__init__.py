"""Networks, and the data of the modular arithmetic task."""
