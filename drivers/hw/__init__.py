"""drivers/hw"""
