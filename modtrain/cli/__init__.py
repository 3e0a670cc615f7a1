"""The command line: verbs, composed configurations, and what checks the machine."""
