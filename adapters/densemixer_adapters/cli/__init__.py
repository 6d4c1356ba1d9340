"""The command ``densemixer``.

``app``         its commands: what they take and what they print
``launch``      ``setup`` and ``run``
``doctor``      what is installed and live, and what to do about each problem
``inspection``  ``inspect`` and ``cost``: what a configuration says
``run_log``     the router metrics in the log of a finished run
``report``      ``report``: what they say, drawn
``columns``     tables for a terminal and for a file
``site_hook``   the start-up hook where pip doesn't put it
``printable``   text of others, made fit for a terminal
"""
