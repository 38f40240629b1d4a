// Which products (csrc/cpu/product.h) the processor has.
#pragma once

#include "../common/convert.h"
#include "../cpu/product.h"

namespace dfe {

inline bool product_supported(Product product) {
#if defined(DFE_NARROW_PRODUCTS)
    if (product == Product::pairs) return pairs_supported();
    if (product == Product::tiles) return tiles_supported();
    if (product == Product::fours) return fours_supported();
    if (product == Product::byte_tiles) return byte_tiles_supported();
#endif
    return product == Product::float32;
}

// The product taken for a type: the best that the processor has.
inline Product best_product(FloatType type) {
    if (type == FloatType::bfloat16) {
        for (Product product : {Product::tiles, Product::pairs}) {
            if (product_supported(product)) return product;
        }
    }
    return Product::float32;
}

}  // namespace dfe
