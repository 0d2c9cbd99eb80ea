package nfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/maphash"
	"log/slog"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// places says where the files of a tree lie: for each handle the directory and
// the name, for a file with several names each of them. A handle is known by its
// hash; that two have the same shows when what was opened is compared with the
// handle. The cost is about 100 bytes a name.
type places struct {
	seed  maphash.Seed
	first map[uint64]place
	more  map[uint64][]place
}

type place struct {
	dir  uint64
	name string
}

// newPlaces makes an empty table; those of one tree have one seed.
func newPlaces(seed maphash.Seed) *places {
	return &places{seed: seed, first: map[uint64]place{}, more: map[uint64][]place{}}
}

func (p *places) key(h kernelHandle) uint64 { return maphash.String(p.seed, string(h)) }

// add makes at the place that is tried first.
func (p *places) add(key uint64, at place) {
	old, known := p.first[key]
	if known && old == at {
		return
	}
	p.first[key] = at
	if known {
		rest := slices.DeleteFunc(p.more[key], func(x place) bool { return x == at })
		p.more[key] = append(rest, old)
	}
}

// addLast adds a place if it is not known, as the last one.
func (p *places) addLast(key uint64, at place) {
	old, known := p.first[key]
	switch {
	case !known:
		p.first[key] = at
	case old != at && !slices.Contains(p.more[key], at):
		p.more[key] = append(p.more[key], at)
	}
}

func (p *places) drop(key uint64, at place) {
	rest := p.more[key]
	if p.first[key] != at {
		rest = slices.DeleteFunc(rest, func(x place) bool { return x == at })
	} else if n := len(rest); n > 0 {
		p.first[key], rest = rest[n-1], rest[:n-1]
	} else {
		delete(p.first, key)
	}
	if len(rest) == 0 {
		delete(p.more, key)
	} else {
		p.more[key] = rest
	}
}

// get returns a file's n-th place.
func (p *places) get(key uint64, n int) (place, bool) {
	if n == 0 {
		at, known := p.first[key]
		return at, known
	}
	if more := p.more[key]; n <= len(more) {
		return more[n-1], true
	}
	return place{}, false
}

// add remembers a place.
func (t *keptTree) add(h, dir kernelHandle, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.record(func(p *places) { p.add(p.key(h), place{p.key(dir), name}) })
}

// forget forgets a place.
func (t *keptTree) forget(h, dir kernelHandle, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.record(func(p *places) { p.drop(p.key(h), place{p.key(dir), name}) })
}

// record changes the table, and the one that a walk is making; mu is held.
func (t *keptTree) record(change func(*places)) {
	change(t.places)
	if t.walk != nil {
		change(t.walk.found)
	}
}

// maxDepth bounds how deep a tree can be.
const maxDepth = 1 << 14

// path returns a handle's n-th path from the top. That there are no places left
// to try is not the same as that there is none that leads from the top: those
// that don't are given back as an empty path, which nothing can be opened by.
func (t *keptTree) path(h kernelHandle, n int) (string, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	top := t.places.key(t.top)
	at, known := t.places.get(t.places.key(h), n)
	if !known {
		return "", false
	}
	names := []string{at.name}
	for at.dir != top {
		if at, known = t.places.get(at.dir, 0); !known || len(names) > maxDepth {
			return "", true
		}
		names = append(names, at.name)
	}
	slices.Reverse(names)
	return strings.Join(names, "/"), true
}

// above says whether a directory is another one or above it, as far as is known.
func (t *keptTree) above(dir, h kernelHandle) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	key, top, at := t.places.key(dir), t.places.key(t.top), t.places.key(h)
	for range maxDepth {
		if at == key {
			return true
		}
		next, known := t.places.get(at, 0)
		if at == top || !known {
			return false
		}
		at = next.dir
	}
	return false
}

// walk is one walk over the whole tree.
type walk struct {
	found *places
	begin time.Time
	ended time.Time
	done  chan struct{}
}

// minPause is the shortest time between two walks that were made because a
// handle led nowhere.
const minPause = 10 * time.Second

// refresh is called when the table does not lead to a handle's file, and says
// whether it may do so now: the first walk may have been under way, or somebody
// moved files about on this machine. Most often the file is gone, and clients
// ask for such files now and then, so that walks must not cost much in all.
func (t *keptTree) refresh() bool {
	t.mu.Lock()
	if t.walk == nil {
		if pause := max(minPause, 50*t.walked.ended.Sub(t.walked.begin)); time.Since(t.walked.ended) < pause {
			t.mu.Unlock()
			return false
		}
		t.startWalk()
	}
	w := t.walk
	t.mu.Unlock()
	<-w.done
	return t.ctx.Err() == nil
}

// startWalk begins a walk; mu is held and none is running.
func (t *keptTree) startWalk() {
	w := &walk{found: newPlaces(t.places.seed), begin: time.Now(), done: make(chan struct{})}
	t.walk = w
	t.walks.Go(func() {
		err := t.walkAll(w)
		t.mu.Lock()
		defer t.mu.Unlock()
		t.walk = nil
		w.ended = time.Now()
		t.walked = walk{begin: w.begin, ended: w.ended}
		if err == nil {
			t.places = w.found
		}
		close(w.done)
		t.log.LogAttrs(context.Background(), slog.LevelDebug, "looked where all files lie", slog.String("dir", t.dir),
			slog.Int("files", len(w.found.first)), slog.Duration("took", w.ended.Sub(w.begin)), slog.Any("err", err))
	})
}

// walkAll fills a table. What requests find out meanwhile is newer.
func (t *keptTree) walkAll(w *walk) error {
	buf := make([]byte, 64<<10)
	todo := []string{"."}
	for len(todo) > 0 {
		if t.ctx.Err() != nil {
			return t.ctx.Err()
		}
		dir := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		fd, err := t.openPath(dir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			// Gone since, or the user's and closed to himself. Both show when
			// somebody asks for what is in it.
			continue
		}
		subdirs, err := t.walkDir(w, fd, dir, buf)
		unix.Close(fd)
		if err != nil {
			return err
		}
		todo = append(todo, subdirs...)
	}
	return nil
}

// walkDir adds the entries of one directory and returns its subdirectories.
func (t *keptTree) walkDir(w *walk, fd int, dir string, buf []byte) (subdirs []string, err error) {
	h, err := t.handleAt(fd, "")
	if err != nil {
		return nil, err
	}
	at := w.found.key(h)
	type found struct {
		key  uint64
		name string
	}
	var batch []found
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil && !errors.Is(err, unix.ENOENT) { // ENOENT: removed meanwhile
			return nil, err
		}
		if err != nil || n == 0 {
			return subdirs, nil
		}
		batch = batch[:0]
		for p := buf[:n]; len(p) >= direntHead; {
			size := int(binary.NativeEndian.Uint16(p[16:]))
			if size < direntHead || size > len(p) {
				return nil, unix.EIO
			}
			raw, typ := p[direntHead:size], p[18]
			p = p[size:]
			if end := bytes.IndexByte(raw, 0); end >= 0 {
				raw = raw[:end]
			}
			name := string(raw)
			if name == "." || name == ".." {
				continue
			}
			if strings.HasPrefix(name, stagePrefix) {
				t.removeStage(fd, name)
				continue
			}
			h, err := t.handleAt(fd, name)
			if err != nil {
				continue // gone since, or a mount point
			}
			batch = append(batch, found{w.found.key(h), name})
			if typ == unix.DT_DIR || typ == unix.DT_UNKNOWN {
				subdirs = append(subdirs, path.Join(dir, name))
			}
		}
		t.mu.Lock()
		for _, f := range batch {
			w.found.addLast(f.key, place{at, f.name})
		}
		t.mu.Unlock()
	}
}

// removeStage removes what a process that was killed left half made.
func (t *keptTree) removeStage(dirfd int, name string) {
	if strings.HasPrefix(name, t.stageName) {
		return // a request of this process is at it
	}
	if unix.Unlinkat(dirfd, name, 0) != nil {
		unix.Unlinkat(dirfd, name, unix.AT_REMOVEDIR)
	}
}
