"""What can be done with a trained run: write texts, predict, open a folder of a model."""
