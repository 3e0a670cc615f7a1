"""`python -m modtrain.inference.tasks`: lm-eval's command line, with the model ``modtrain``.

lm-eval 0.4.13 finds only models that are registered in its process: it looks for no entry points.
"""

from lm_eval.__main__ import cli_evaluate

from modtrain.inference.tasks.language_model import register

if __name__ == "__main__":
    register()
    cli_evaluate()
