package images

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// BusyError says that another process holds a lock of the state directory.
type BusyError struct {
	File   string
	Holder string // what the holder wrote: its command and process id
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("another krgimage is at work on this state directory (%s holds %s): wait for it or stop it first", e.Holder, e.File)
}

// Lock takes an exclusive lock file for the life of the process or until the
// returned function is called. The kernel drops the lock of a process that
// died, so a left-over file means nothing.
func Lock(file, command string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", file, err)
		}
		holder, _ := io.ReadAll(io.LimitReader(f, 256))
		return nil, &BusyError{file, strings.TrimSpace(string(holder))}
	}
	if err := f.Truncate(0); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", file, err)
	}
	fmt.Fprintf(f, "krgimage %s, process %d\n", command, os.Getpid())
	return func() { f.Close() }, nil
}
