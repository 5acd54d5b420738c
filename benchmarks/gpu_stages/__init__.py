"""The stages of gpu.py: each module has run(record, clock), which fills a record until it is done or out of time."""
