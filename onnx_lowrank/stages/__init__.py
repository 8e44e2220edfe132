"""The stages of a compression, in order: score, plan, settle, fit, recover, build, search, check, report."""
