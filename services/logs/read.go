package logs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Filter says which records are wanted.
type Filter struct {
	Nodes []int      // none: all
	Level slog.Level // and worse
	Since time.Time  // by the head's clock
	Last  int        // only so many, the newest; 0: all
}

func (f Filter) match(r Record) bool {
	return (len(f.Nodes) == 0 || slices.Contains(f.Nodes, r.Node)) && r.Level >= f.Level && !r.Received.Before(f.Since)
}

// Read yields the records in dir in the order in which they came. With follow
// it goes on with those that come, until ctx ends. An error is the last thing
// it yields. A dir that doesn't exist (yet) has no records.
func Read(ctx context.Context, dir string, f Filter, follow bool) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		// The current file is opened first: what is rotated away meanwhile is
		// found under its old name or its new one, and skipped the second time.
		current, err := os.Open(filepath.Join(dir, currentFile))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			yield(Record{}, fmt.Errorf("the nodes' logs: %w", err))
			return
		}
		var keep []Record
		out := func(r Record) bool {
			if !f.match(r) {
				return true
			}
			if f.Last == 0 {
				return yield(r, nil)
			}
			if keep = append(keep, r); len(keep) > 2*f.Last {
				keep = append(keep[:0], keep[len(keep)-f.Last:]...)
			}
			return true
		}
		for n := files - 1; n > 0; n-- {
			if !readOld(filepath.Join(dir, rotated(n)), current, f.Since, out) {
				closeIf(current)
				return
			}
		}
		t := tail{dir: dir, file: current}
		defer func() { closeIf(t.file) }()
		if !t.drain(out) {
			return
		}
		for _, r := range keep[max(0, len(keep)-f.Last):] {
			if !yield(r, nil) {
				return
			}
		}
		f.Last, keep = 0, nil
		for follow {
			select {
			case <-ctx.Done():
				return
			case <-time.After(followPause):
			}
			if !t.drain(out) || !t.next(out) {
				return
			}
		}
	}
}

// followPause is how often a file is looked at for new records.
const followPause = 250 * time.Millisecond

func closeIf(f *os.File) {
	if f != nil {
		f.Close()
	}
}

// readOld reads a rotated file, unless it is current or has only what is older
// than since.
func readOld(path string, current *os.File, since time.Time, out func(Record) bool) bool {
	file, err := os.Open(path)
	if err != nil {
		return true
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.ModTime().Before(since) || current != nil && sameFile(file, current) {
		return true
	}
	for lines := scanner(file); lines.Scan(); {
		if r, ok := decode(lines.Bytes()); ok && !out(r) {
			return false
		}
	}
	return true
}

func sameFile(a, b *os.File) bool {
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// tail reads the current file as it grows.
type tail struct {
	dir    string
	file   *os.File // nil: not there yet
	reader *bufio.Reader
	half   []byte // a line without its end
}

// drain yields what has been written.
func (t *tail) drain(out func(Record) bool) bool {
	if t.file == nil {
		return true
	}
	if t.reader == nil {
		t.reader = bufio.NewReader(t.file)
	}
	for {
		line, err := t.reader.ReadBytes('\n')
		t.half = append(t.half, line...)
		if err != nil {
			return err == io.EOF
		}
		r, ok := decode(t.half)
		t.half = t.half[:0]
		if ok && !out(r) {
			return false
		}
	}
}

// next goes on to a new current file, if there is one.
func (t *tail) next(out func(Record) bool) bool {
	file, err := os.Open(filepath.Join(t.dir, currentFile))
	if err != nil {
		return true
	}
	if t.file != nil && sameFile(file, t.file) {
		file.Close()
		return true
	}
	if !t.drain(out) { // what was written before it was rotated away
		file.Close()
		return false
	}
	closeIf(t.file)
	*t = tail{dir: t.dir, file: file}
	return t.drain(out)
}
