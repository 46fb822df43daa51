package bundle

import (
	"context"
	"errors"

	"clonecluster/image"
)

// VerifyDisk compares a device or disk image with a build's manifest.
func VerifyDisk(ctx context.Context, path, manifest string, o VerifyOptions) (*Report, *image.Manifest, error) {
	return nil, nil, errors.New("not yet")
}
