package coldplug

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Event is one message of the kernel about a device
// (Documentation/driver-api/driver-model; lib/kobject_uevent.c).
type Event struct {
	Action string            // add, remove, change, move, online, offline, bind, unbind
	Path   string            // below /sys, for example /devices/pci0000:00/0000:00:03.0
	Env    map[string]string // SUBSYSTEM, MODALIAS, DEVNAME and others
}

// Listener receives the kernel's device messages.
type Listener struct{ file *os.File }

// Listen opens a listener. Events are queued from now on, so that a caller who
// listens first and walks sysfs afterwards misses nothing.
func Listen() (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("listen for device events: %w", err)
	}
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen for device events: %w", err)
	}
	// A driver for a bus adapter can bring hundreds of devices at once.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<20)
	return &Listener{file: os.NewFile(uintptr(fd), "uevent")}, nil
}

// Close ends Run.
func (l *Listener) Close() error { return l.file.Close() }

// Run calls handle for every event until ctx ends, which is no error. handle
// gets an Event without action for lost ones.
func (l *Listener) Run(ctx context.Context, handle func(Event)) error {
	stop := context.AfterFunc(ctx, func() { l.file.Close() })
	defer stop()
	raw, err := l.file.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(recvErr, unix.EAGAIN)
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("device events: %w", err)
		case errors.Is(recvErr, unix.ENOBUFS):
			handle(Event{})
			continue
		case recvErr != nil:
			return fmt.Errorf("device events: %w", recvErr)
		}
		// Only the kernel itself (port 0) is believed.
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue
		}
		if e, ok := ParseEvent(buf[:n]); ok {
			handle(e)
		}
	}
}

// ParseEvent reads "ACTION@PATH\0KEY=VALUE\0...".
func ParseEvent(msg []byte) (Event, bool) {
	fields := strings.Split(strings.TrimRight(string(msg), "\x00"), "\x00")
	action, path, ok := strings.Cut(fields[0], "@")
	if !ok || action == "" {
		return Event{}, false
	}
	e := Event{Action: action, Path: path, Env: make(map[string]string, len(fields)-1)}
	for _, f := range fields[1:] {
		if k, v, ok := strings.Cut(f, "="); ok {
			e.Env[k] = v
		}
	}
	return e, true
}
