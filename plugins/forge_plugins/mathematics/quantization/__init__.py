"""Quantized layers: levels, products, conversion, packing."""
