"""What tests do with an open page of the browser."""

from playwright.sync_api import expect


def live(page):
    """The page once its stream of events stands."""
    expect(page.locator("#link")).to_have_attribute("data-state", "live")
    return page


def press(page, keys: str) -> None:
    """Press keys, separated by spaces, once the page's scripts have run."""
    page.wait_for_load_state("load")
    for key in keys.split():
        page.keyboard.press(key)
