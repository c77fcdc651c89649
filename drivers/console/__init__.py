"""drivers/console"""
