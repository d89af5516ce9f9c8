/* libdevmapper as assay-agent has it on XCP-ng 8.3. udev makes the nodes, and is waited for. */
#define _REENTRANT
#define DEFAULT_DM_ADD_NODE DM_ADD_NODE_ON_RESUME
#define DEFAULT_DM_NAME_MANGLING DM_STRING_MANGLING_HEX
#define DEFAULT_DM_RUN_DIR "/run"
#define DEFAULT_PROC_DIR "/proc"
#define DEFAULT_SYS_DIR "/etc/lvm"
#define DEFAULT_SI_UNIT_CONSISTENCY 1
#define DEVMAPPER_SUPPORT 1
#define DM_DEVICE_GID 0
#define DM_DEVICE_MODE 0600
#define DM_DEVICE_UID 0
#define DM_IOCTLS 1
#define DM_LIB_VERSION "1.02.205"
#define HAVE_CANONICALIZE_FILE_NAME 1
#define HAVE_GETLINE 1
#define HAVE_GETOPTLONG 1
#define HAVE_LINUX_FIEMAP_H 1
#define HAVE_LINUX_MAGIC_H 1
#define HAVE_REALTIME 1
#define HAVE_SYS_IOCTL_H 1
#define HAVE_SYS_STATVFS_H 1
#define HAVE_SYS_TIMERFD_H 1
#define HAVE_TERMIOS_H 1
#define HAVE___BUILTIN_CLZ 1
#define HAVE___BUILTIN_CLZLL 1
#define UDEV_SYNC_SUPPORT 1
