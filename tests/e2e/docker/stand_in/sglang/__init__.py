"""Stands where SGLang stands in an image that has none: the lab's replica answers instead."""
