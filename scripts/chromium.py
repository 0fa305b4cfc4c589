"""The browser that pages are looked at with: the system's Chromium, never a library's download."""

CHROMIUM = "/usr/bin/chromium"
OFF = (
    # Drawn for each window, although nobody types into its address bar: a second of a processor.
    *("WebUIOmniboxPopup", "WebUIOmniboxAimPopup"),
    # Of several such flags only the last counts: what Playwright turns off is said again.
    *("AimEnabled", "AvoidCorsURLLoaderRestartOnRedirect", "DestroyProfileOnBrowserClose"),
    *("AvoidUnnecessaryBeforeUnloadCheckSync", "HttpsFirstBalancedModeAutoEnable"),
    *("HttpsUpgrades", "LensOverlay", "MediaRouter", "NetworkTimeServiceQuerying"),
    *("OptimizationHints", "PaintHolding", "PreconnectToSearch", "ThirdPartyStoragePartitioning"),
)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    f"--disable-features={','.join(OFF)}",
]
