"""Distillation with weights from influence: the trainer, its mechanisms, rules and runs on disk."""
