/*
 * Stands in for libudev at link time, so that the program asks for the names and the version that the host's own library has,
 * and for none that came later. Nothing of this is in the package. What libdevmapper calls of it, and no more.
 */
void udev_new(void) {}
void udev_unref(void) {}
void udev_queue_new(void) {}
void udev_queue_unref(void) {}
void udev_queue_get_udev_is_active(void) {}
