"""Many runs of one pipeline: which, in which processes, and which was best."""
