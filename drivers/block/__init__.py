"""drivers/block"""
