"""Scores of a trained run on tasks, by EleutherAI's lm-eval; `evaluate_tasks.evaluate_tasks`."""
