"""What a run writes about itself: its record, its status, its log."""
