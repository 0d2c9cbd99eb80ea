package coldplug

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Loader inserts modules into the running kernel. Its methods may be called
// from several goroutines; insertions happen one at a time.
type Loader struct {
	index  *Index
	dir    string                  // module directory, /lib/modules/RELEASE
	insert func(file string) error // finit_module(2), replaced in tests

	mu   sync.Mutex
	done map[string]error // guarded by mu: result by module file
	seen map[string]bool  // guarded by mu: modaliases already handled
}

// NewLoader returns a loader for the module directory dir.
func NewLoader(index *Index, dir string) *Loader {
	return &Loader{index: index, dir: dir, insert: insertFile, done: map[string]error{}, seen: map[string]bool{}}
}

// Open reads the index of the running kernel's modules below root ("/" or a
// mounted file system) with its blacklists.
func Open(root string) (*Loader, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	release := unix.ByteSliceToString(uts.Release[:])
	dir := filepath.Join(root, "lib/modules", release)
	ix, err := ReadIndex(os.DirFS(dir))
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", release, err)
	}
	for _, d := range []string{"lib/modprobe.d", "etc/modprobe.d"} {
		if err := ix.ReadBlacklist(os.DirFS(filepath.Join(root, d))); err != nil {
			return nil, err
		}
	}
	return NewLoader(ix, dir), nil
}

// Load inserts the module called name (or the modules behind that alias) and
// what it needs. A module that is already there is no error.
func (l *Loader) Load(name string) error {
	files, err := l.index.Order(name)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var first error
	for _, f := range files {
		if err := l.once(f); err != nil && first == nil {
			first = err
		}
	}
	// Errors of soft dependencies matter only if the module itself fails.
	if err, ok := l.done[l.index.modules[normal(name)].path]; ok && err == nil {
		return nil
	}
	return first
}

// once inserts one file unless that was tried before, or a module it needs
// failed. The caller holds mu and has had those tried.
func (l *Loader) once(file string) error {
	if err, ok := l.done[file]; ok {
		return err
	}
	var err error
	for _, dep := range l.index.modules[moduleName(file)].deps {
		err = errors.Join(err, l.done[dep])
	}
	if err == nil {
		err = l.insert(filepath.Join(l.dir, file))
	}
	l.done[file] = err
	return err
}

// Plug loads the drivers of one device and returns the names of those that
// were newly inserted. Drivers that find no hardware to their liking (ENODEV)
// are no error.
func (l *Loader) Plug(modalias string) (loaded []string, err error) {
	l.mu.Lock()
	if l.seen[modalias] {
		l.mu.Unlock()
		return nil, nil
	}
	l.seen[modalias] = true
	l.mu.Unlock()

	var errs []error
	for _, name := range l.index.Match(modalias) {
		l.mu.Lock()
		_, before := l.done[l.index.modules[name].path]
		l.mu.Unlock()
		if before || l.index.builtin[name] {
			continue
		}
		err := l.Load(name)
		switch {
		case err == nil:
			loaded = append(loaded, name)
		case !errors.Is(err, unix.ENODEV):
			errs = append(errs, err)
		}
	}
	return loaded, errors.Join(errs...)
}

// Walk plugs every device below dir (/sys/devices) and repeats until a pass
// loads nothing new, since a loaded driver may bring new devices. It returns
// the names of the modules that were inserted; errors of single drivers are
// joined and don't stop it.
func (l *Loader) Walk(ctx context.Context, dir string) (loaded []string, err error) {
	var errs []error
	for {
		n := len(loaded)
		walkErr := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil || d.Name() != "modalias" {
				return nil // devices come and go while we walk
			}
			text, err := os.ReadFile(p)
			if err != nil {
				return nil
			}
			names, err := l.Plug(string(bytes.TrimSpace(text)))
			loaded = append(loaded, names...)
			if err != nil {
				errs = append(errs, err)
			}
			return nil
		})
		if walkErr != nil {
			return loaded, walkErr
		}
		if len(loaded) == n {
			return loaded, errors.Join(errs...)
		}
	}
}

// moduleInitCompressedFile is MODULE_INIT_COMPRESSED_FILE of linux/module.h:
// the kernel unpacks the file (CONFIG_MODULE_DECOMPRESS).
const moduleInitCompressedFile = 4

func insertFile(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("load kernel module: %w", err)
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(file, ".ko") {
		flags = moduleInitCompressedFile
	}
	err = unix.FinitModule(int(f.Fd()), "", flags)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load kernel module %s: %w", moduleName(file), err)
	}
	return nil
}
