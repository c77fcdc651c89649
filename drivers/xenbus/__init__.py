"""drivers/xenbus"""
