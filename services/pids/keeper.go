package pids

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// interval is the time between two looks at the allocator. The margin lasts for
// 200,000 forks a second then.
const interval = 20 * time.Millisecond

// Cursor is a PID namespace's allocator: the last id that it gave.
type Cursor interface {
	Last() (int, error)
	SetLast(pid int) error
}

// lastPID is the kernel's cursor of the namespace that this process is in.
type lastPID struct{ f *os.File }

// OpenCursor opens the cursor of this process's PID namespace
// (/proc/sys/kernel/ns_last_pid, in kernels with CONFIG_CHECKPOINT_RESTORE).
func OpenCursor() (interface {
	Cursor
	Close() error
}, error) {
	f, err := os.OpenFile("/proc/sys/kernel/ns_last_pid", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("process ids of this node can't be kept apart from the others': %w", err)
	}
	return lastPID{f}, nil
}

func (c lastPID) Close() error { return c.f.Close() }

func (c lastPID) Last() (int, error) {
	var buf [16]byte
	n, err := c.f.ReadAt(buf[:], 0)
	if n == 0 && err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(buf[:n])))
}

func (c lastPID) SetLast(pid int) error {
	_, err := c.f.WriteAt(strconv.AppendInt(nil, int64(pid), 10), 0)
	return err
}

// Keeper keeps a namespace's allocator in a range.
type Keeper struct {
	cursor Cursor
	r      Range
}

// NewKeeper sets the allocator to the start of the range.
func NewKeeper(c Cursor, r Range) (*Keeper, error) {
	k := &Keeper{c, r}
	if err := k.turn(); err != nil {
		return nil, err
	}
	return k, nil
}

func (k *Keeper) turn() error {
	if err := k.cursor.SetLast(k.r.First - 1); err != nil {
		return fmt.Errorf("set the next process id to %d: %w", k.r.First, err)
	}
	return nil
}

// Step looks once, and turns the allocator back if it is near the end of the
// range or outside.
func (k *Keeper) Step() (turned bool, err error) {
	last, err := k.cursor.Last()
	if err != nil {
		return false, fmt.Errorf("read the last process id: %w", err)
	}
	if last >= k.r.First-1 && last < k.r.Turn() {
		return false, nil
	}
	return true, k.turn()
}

// Run keeps the range until ctx ends, on a thread of its own with real-time
// priority: a busy node must not keep it from turning in time.
func (k *Keeper) Run(ctx context.Context, log *slog.Logger) error {
	runtime.LockOSThread() // for good: the thread ends with this goroutine
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 10, Flags: unix.SCHED_FLAG_RESET_ON_FORK}, 0); err != nil {
		log.Warn("process ids are kept in range without real-time priority", "err", err)
	}
	for {
		if _, err := k.Step(); err != nil && !errors.Is(err, os.ErrClosed) {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(interval):
		}
	}
}
