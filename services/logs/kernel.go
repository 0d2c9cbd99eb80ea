package logs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// kernelLine is a record of /dev/kmsg (Documentation/ABI/testing/dev-kmsg).
type kernelLine struct {
	priority int // facility * 8 + level
	sequence uint64
	text     string
}

// parseKernel reads PRIORITY,SEQUENCE,MICROSECONDS,FLAGS[,...];TEXT, with
// further lines of KEY=VALUE that are left out.
func parseKernel(b []byte) (kernelLine, error) {
	line, _, _ := strings.Cut(string(b), "\n")
	head, text, ok := strings.Cut(line, ";")
	fields := strings.Split(head, ",")
	if !ok || len(fields) < 4 {
		return kernelLine{}, fmt.Errorf("kernel log: bad record %.40q", line)
	}
	priority, err1 := strconv.ParseUint(fields[0], 10, 16)
	sequence, err2 := strconv.ParseUint(fields[1], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return kernelLine{}, fmt.Errorf("kernel log: bad record %.40q: %w", line, err)
	}
	return kernelLine{int(priority), sequence, text}, nil
}

// record says what the head is told of a line: the kernel's warnings and worse,
// and all of init's own, which it writes as facility daemon (node/bootlog).
func (k kernelLine) record() (source string, level slog.Level, text string, ok bool) {
	const facilityKernel, facilityDaemon = 0, 3
	switch facility, priority := k.priority>>3, k.priority&7; {
	case facility == facilityKernel && priority <= 3:
		return SourceKernel, slog.LevelError, k.text, true
	case facility == facilityKernel && priority == 4:
		return SourceKernel, slog.LevelWarn, k.text, true
	case facility == facilityDaemon:
		text, ok := strings.CutPrefix(k.text, "krg: ")
		if !ok {
			break
		}
		if t, ok := strings.CutPrefix(text, "error: "); ok {
			return SourceInit, slog.LevelError, t, true
		}
		if t, ok := strings.CutPrefix(text, "warning: "); ok {
			return SourceInit, slog.LevelWarn, t, true
		}
		return SourceInit, slog.LevelInfo, text, true
	}
	return "", 0, "", false
}

// KernelLog is the kernel's log device.
const KernelLog = "/dev/kmsg"

// ReadKernel adds the records of /dev/kmsg until ctx ends. It goes on where an
// earlier reader in this boot, which noted it in the file mark, ended.
func (c *Collector) ReadKernel(ctx context.Context, device, mark string) error {
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_NONBLOCK, 0) // so that Close ends a Read
	if err != nil {
		return fmt.Errorf("kernel log: %w", err)
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	return c.readKernel(ctx, f, mark)
}

// readKernel is ReadKernel with a reader that gives a record at each Read.
func (c *Collector) readKernel(ctx context.Context, device io.Reader, mark string) error {
	next := uint64(0)
	if text, err := os.ReadFile(mark); err == nil {
		next, _ = strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	}
	buf := make([]byte, 8<<10) // a record is shorter
	for {
		n, err := device.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EPIPE): // records were overwritten before we read them
			continue
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("kernel log: %w", err)
		}
		k, err := parseKernel(buf[:n])
		if err != nil || k.sequence < next {
			continue
		}
		next = k.sequence + 1
		source, level, text, ok := k.record()
		if !ok {
			continue
		}
		c.Add(source, level, text, nil)
		_ = os.WriteFile(mark, strconv.AppendUint(nil, next, 10), 0o600)
	}
}

// containerPause is how often init is asked for new output.
const containerPause = 2 * time.Second

// ReadContainer adds what the container's services print, line by line, until
// ctx ends. fetch gives the output from the offset after on, and the offset of
// its end; 0 is the start of what is kept.
func (c *Collector) ReadContainer(ctx context.Context, fetch func(ctx context.Context, after uint64) (text string, end uint64, err error)) error {
	var after uint64
	var half string
	for {
		text, end, err := fetch(ctx, after)
		if err == nil && end != after {
			after = end
			lines := strings.Split(half+text, "\n")
			half = lines[len(lines)-1]
			for _, line := range lines[:len(lines)-1] {
				if line = strings.TrimRight(line, "\r"); line != "" {
					c.Add(SourceContainer, slog.LevelInfo, line, nil)
				}
			}
			if len(half) > maxMessage {
				c.Add(SourceContainer, slog.LevelInfo, half, nil)
				half = ""
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(containerPause):
		}
	}
}
