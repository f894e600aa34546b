"""The eight modules of the Phase 5 training pipeline."""
