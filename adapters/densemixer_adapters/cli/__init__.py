"""The command ``densemixer``.

``app``         its commands: what they take and what they print
``launch``      ``setup`` and ``run``
``doctor``      what is installed and live, and what to do about each problem
``inspection``  ``inspect`` and ``cost``: what a configuration says
``preflight``   ``preflight``: what it takes; ``texts`` are its data, ``preflight_report`` what it prints and draws
``run_log``     the router metrics in the log of a finished run
``report``      ``report``: what they say, drawn
``columns``     tables for a terminal and for a file
``page``        a page with verdicts, pictures and numbers
``reading``     what becomes of errors where something can't be used
``site_hook``   the start-up hook where pip doesn't put it
``printable``   text of others, made fit for a terminal
"""
