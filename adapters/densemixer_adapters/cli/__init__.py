"""The command ``densemixer``.

``app``         its commands
``doctor``      what is installed and live, and what to do about each problem
``inspection``  ``inspect`` and ``cost``: what a configuration says
``report``      the router metrics of a finished run
``site_hook``   ``setup``: the start-up hook where pip doesn't put it
``printable``   text of others, made fit for a terminal
"""
