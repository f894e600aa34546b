"""The training session and its parts. Only this package and the runner call hooks."""
