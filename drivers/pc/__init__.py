"""drivers/pc"""
