"""Distillation of a pruned model from its dense teacher."""
