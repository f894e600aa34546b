"""Which batch size suits a machine: steps measured in processes of their own."""
